"""What a model learnt against what it forgot, as a picture for a page: inline SVG, every text escaped.

Does not know: how anything was measured.
"""

from __future__ import annotations

from markupsafe import Markup

from luthier.spec.keeping import Keeping

WIDTH, HEIGHT, LEFT, TOP = 460, 240, 60, 14  # of the plot, in pixels


def section(found: Keeping | None) -> Markup:
    """The card of a report's `keeping`; nothing without one."""
    points = found.known() if found is not None else []
    if found is None or not points:
        return Markup()
    up = 1 if found.upward else -1
    tasks, losses = [up * task for _, task, _ in points], [lost for _, _, lost in points]
    room, edge = (max(tasks) - min(tasks)) * 0.1 or 0.05, (max(losses) - min(losses)) * 0.1 or 0.01
    low, high, first, last = min(tasks) - room, max(tasks) + room, min(losses) - edge, max(losses) + edge

    def at(task: float, lost: float) -> tuple[float, float]:
        across, down = (lost - first) / (last - first), (high - up * task) / (high - low)
        return round(LEFT + across * WIDTH, 1), round(TOP + down * HEIGHT, 1)

    parts = []
    for n in range(5):
        y, x = TOP + n / 4 * HEIGHT, LEFT + n / 4 * WIDTH
        task, lost = up * (high - n / 4 * (high - low)), first + n / 4 * (last - first)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{task:.3g}</text>')
        parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{lost:+.1%}</text>')
    front = sorted(at(task, lost) for point, task, lost in points if point.front)
    parts.append(f'<polyline class="stroke-tuned" points="{" ".join(f"{x},{y}" for x, y in front)}"/>')
    for point, task, lost in points:
        x, y = at(task, lost)
        kind, size = ("tuned", 7) if point.scale == found.chosen else ("base", 4)
        name = "base" if point.scale == 0 else f"{point.scale:g}"
        said = f"<title>{name}: {task:.4f}, {lost:+.1%}</title>"
        parts.append(f'<circle class="fill-{kind}" cx="{x}" cy="{y}" r="{size}">{said}</circle>')
        parts.append(f'<text x="{x + 9}" y="{y - 6}">{name}</text>')
    size_words = f"0 0 {LEFT + WIDTH + 40} {TOP + HEIGHT + 26}"
    drawn = Markup('<svg viewBox="{}" role="img">{}</svg>').format(size_words, Markup("".join(parts)))
    words = found.metric.replace("_", " ") if found.by == "metric" else "loss"
    note = f"Up: {words}. Across: general ability lost. The line joins the scales that no other beats. {found.rule}"
    card = '<h2>What was kept</h2><section class="card"><p>{}</p>{}<p class="soft">{}</p></section>'
    return Markup(card).format(found.sentence, drawn, note)
