"""Makes the general rows that `--replay` mixes in when no file is named: short chats of our own, the same every time.

`python -m luthier.data.general FILE` writes them; a test holds the packaged file against it, and against the probe of
the forgetting meter, with which no row shares a prompt, an answer or a fact: what is measured is not what is trained.
Questions and facts are written by hand, sums and formats are made. Does not know: models, templates, the probe.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from luthier.spec.run import write_whole

Turn = tuple[str, str]  # (asked, answered)
SEED = 7041
PLACE = resources.files("luthier.data") / "general.jsonl"

FACTS: tuple[Turn, ...] = (
    ("What do we call a baby kangaroo?", "A baby kangaroo is called a joey."),
    ("Why do leaves look green?", "Leaves look green because the chlorophyll in them reflects green light."),
    ("How many lines does a staff in music have?", "A staff in music has five lines."),
    ("What does a barometer tell us?", "A barometer tells us how strongly the air presses."),
    ("Which sea separates Italy from Croatia?", "The Adriatic Sea lies between Italy and Croatia."),
    ("What is the name of a shape with eight sides?", "A shape with eight sides is called an octagon."),
    ("What are clouds made of?", "Clouds are made of tiny drops of water or crystals of ice."),
    ("Who wrote the novel Don Quixote?", "Miguel de Cervantes wrote Don Quixote."),
    ("What is sushi usually wrapped in?", "Sushi rolls are usually wrapped in sheets of dried seaweed."),
    ("How long does the Moon take to go around the Earth?", "The Moon takes about 27 days to go around the Earth."),
    ("How many legs does an insect have?", "An insect has six legs."),
    ("Which metal is a liquid at room temperature?", "Mercury is a metal that is liquid at room temperature."),
    ("What is a group of lions called?", "A group of lions is called a pride."),
    ("What does a compass needle point to?", "The needle of a compass points to magnetic north."),
    ("Why does bread rise?", "Bread rises because yeast makes bubbles of gas in the dough."),
    ("What is the coldest continent?", "Antarctica is the coldest continent."),
    ("Which instrument has black and white keys?", "The piano has black and white keys."),
    ("What do koalas mostly eat?", "Koalas mostly eat the leaves of eucalyptus trees."),
    ("How many players are on a volleyball team on court?", "Six players of a volleyball team are on court."),
    ("What is the opposite of the word generous?", "The opposite of generous is stingy."),
    ("Which ocean lies between Africa and Australia?", "The Indian Ocean lies between Africa and Australia."),
    ("What is chocolate made from?", "Chocolate is made from the beans of the cacao tree."),
    ("What does an astronomer study?", "An astronomer studies stars, planets and everything else in space."),
    ("What makes a rainbow?", "A rainbow appears when sunlight is bent and reflected inside drops of rain."),
    ("What is a sonnet?", "A sonnet is a poem of fourteen lines."),
    ("How do bats find their way in the dark?", "Bats call in high tones and listen for the echoes."),
    ("What is the longest bone in the human body?", "The thigh bone is the longest bone in the human body."),
    ("Which fruit is dried to make raisins?", "Raisins are dried grapes."),
    ("What do you call a person who repairs pipes?", "A person who repairs pipes is called a plumber."),
    ("What is the currency of Sweden?", "The currency of Sweden is the krona."),
    (
        "Why do we have leap years?",
        "A year is about a quarter of a day longer than 365 days, so a day is added every fourth.",
    ),
    ("What is the main ingredient of hummus?", "The main ingredient of hummus is chickpeas."),
    ("Which organ filters the blood to make urine?", "The kidneys filter the blood and make urine."),
    ("What is a peninsula?", "A peninsula is land with water on almost all sides."),
    ("What does a carpenter work with?", "A carpenter works with wood."),
    ("How many zeros are in one million?", "One million is written with six zeros."),
    ("What is the Great Barrier Reef built by?", "The Great Barrier Reef is built by corals."),
    ("What is the plural of the word goose?", "The plural of goose is geese."),
    ("What does the abbreviation PDF stand for?", "PDF stands for Portable Document Format."),
    ("Which vitamin does sunlight help us make?", "Sunlight helps the skin make vitamin D."),
    ("小袋鼠出生后住在哪里？", "小袋鼠出生后住在妈妈的育儿袋里。"),
    ("为什么天空会打雷？", "云里的电突然放出来，空气受热膨胀，就发出了雷声。"),
    ("古筝是用什么弹的？", "古筝是用手指或义甲弹的。"),
    ("昆虫有几条腿？", "昆虫有六条腿。"),
    ("巧克力的原料是什么？", "巧克力的原料是可可豆。"),
    ("《西游记》里陪唐僧取经的猴子叫什么？", "陪唐僧取经的猴子叫孙悟空。"),
    ("指南针有什么用？", "指南针能告诉我们方向。"),
    ("面包为什么会变得松软？", "酵母在面团里产生气体，面包就变得松软。"),
    ("元宵节人们喜欢看什么？", "元宵节人们喜欢看花灯。"),
    ("什么是半岛？", "半岛是三面被水包围的陆地。"),
    ("骆驼的驼峰里主要是什么？", "骆驼的驼峰里主要是脂肪。"),
    ("彩虹是怎么形成的？", "阳光在雨滴里折射和反射，就形成了彩虹。"),
    ("围棋的棋子有哪两种颜色？", "围棋的棋子有黑色和白色两种。"),
    ("蜘蛛网有什么用？", "蜘蛛用网来捕捉小虫。"),
    ("中秋节的月亮有什么特别？", "中秋节的月亮又圆又亮。"),
    ("茶叶是从哪里来的？", "茶叶是从茶树上采下来的。"),
    ("人为什么要睡觉？", "睡觉让身体和大脑得到休息。"),
    ("大象的鼻子可以做什么？", "大象用鼻子喝水、拿东西，也用它闻气味。"),
    ("什么是闰年？", "闰年有366天，二月多一天。"),
    ("海水为什么不能直接喝？", "海水里的盐太多，喝了会让人更渴。"),
)
WRITTEN: tuple[Turn, ...] = (
    (
        "Thank a neighbour for watering your plants, in one sentence.",
        "Thank you so much for looking after my plants while I was away!",
    ),
    (
        "Write a polite note that you will be ten minutes late.",
        "I am sorry, I am running about ten minutes late and will be with you soon.",
    ),
    ("Give a name to a small bakery by the harbour.", "The Harbour Crust"),
    (
        "Explain to a child what a museum is.",
        "A museum is a house that keeps old and precious things so that everybody can look at them.",
    ),
    ("Suggest a title for a story about a lost kite.", "The Kite That Wanted to See the Sea"),
    ("Make this friendlier: Send me the file.", "Could you please send me the file when you have a moment?"),
    (
        "Make this shorter: Due to the fact that it was raining, we remained inside.",
        "Because it rained, we stayed inside.",
    ),
    (
        "Finish the sentence: When the lights went out,",
        "When the lights went out, everybody began to laugh and look for candles.",
    ),
    (
        "What could I cook with rice, eggs and peas?",
        "You could make fried rice: fry the cooked rice, stir in the eggs, and add the peas.",
    ),
    (
        "How do I remove a stain of coffee from a shirt?",
        "Rinse it with cold water at once, rub in a little soap, and wash the shirt as usual.",
    ),
    (
        "I cannot sleep. What may help?",
        "Put screens away, keep the room cool and dark, and go to bed at the same time each day.",
    ),
    ("Give one reason to take the bus.", "The bus is cheaper than a car, and you can read on the way."),
    ("Put this into the past: She walks to school and sings.", "She walked to school and sang."),
    ("Put this into the future: We visit our aunt.", "We will visit our aunt."),
    ("Turn this into a question: The shop opens at nine.", "Does the shop open at nine?"),
    ("用一句话感谢老师。", "老师，谢谢您一直以来的耐心教导！"),
    ("写一句生日祝福给朋友。", "祝你生日快乐，天天开心，心想事成！"),
    ("请把这句话说得更客气：把门关上。", "麻烦您把门关一下，好吗？"),
    ("给一家小书店起个名字。", "转角书屋"),
    ("怎样才能记住新单词？", "每天复习几次，用新单词造句，就容易记住了。"),
    ("把这句话变成问句：他会游泳。", "他会游泳吗？"),
    ("我感冒了，应该注意什么？", "多喝温水，好好休息，发烧严重时去看医生。"),
    ("用一句话介绍博物馆。", "博物馆是收藏和展示珍贵物品的地方。"),
    ("把这句话改短：因为今天外面下着很大的雨，所以我们没有出门。", "今天雨大，我们没出门。"),
    ("接着写一句：小猫悄悄地走到窗前，", "小猫悄悄地走到窗前，望着外面飞过的小鸟。"),
)
THINGS = (
    ("lantern", "yellow"), ("kettle", "silver"), ("scarf", "purple"), ("notebook", "orange"), ("umbrella", "grey"),
    ("backpack", "brown"), ("pillow", "pink"), ("bucket", "turquoise"), ("wallet", "beige"), ("helmet", "golden"),
)  # fmt: skip
THINGS_ZH = (
    ("灯笼", "黄"),
    ("水壶", "银"),
    ("围巾", "紫"),
    ("笔记本", "橙"),
    ("雨伞", "灰"),
    ("背包", "棕"),
    ("枕头", "粉"),
    ("钱包", "米"),
)
WORDS = (
    "violin", "garden", "copper", "meadow", "pepper", "island", "ribbon", "candle", "walnut", "harbour", "pigeon",
    "velvet", "ginger", "tunnel", "mirror", "anchor", "basket", "feather", "quarry", "lemon",
)  # fmt: skip
WORDS_ZH = (
    "小提琴",
    "花园",
    "海岛",
    "蜡烛",
    "核桃",
    "港口",
    "鸽子",
    "生姜",
    "隧道",
    "镜子",
    "篮子",
    "羽毛",
    "柠檬",
    "灯塔",
)
PEOPLE = ("Nora", "Tomas", "Wei", "Amina", "Piet", "Rosa", "Yusuf", "Ingrid")
PEOPLE_ZH = ("小云", "阿强", "小雪", "大壮", "小美", "阿德")


def rows() -> list[Turn]:
    """All of them; no prompt stands twice."""
    rng = random.Random(SEED)
    made = [*FACTS, *WRITTEN, *_sums(rng), *_sums_zh(rng), *_formats(rng), *_formats_zh(rng), *_orders(rng)]
    return list(dict(made).items())


def text() -> str:
    """As the packaged file has them: chats, a line each."""
    lines = (
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
        for asked, answered in rows()
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _sums(rng: random.Random) -> Iterator[Turn]:
    for number in range(60):
        who, (thing, _) = PEOPLE[number % len(PEOPLE)], THINGS[number % len(THINGS)]
        many, few, times = rng.randint(12, 60), rng.randint(2, 11), rng.randint(2, 9)
        if number % 3 == 0:
            yield (
                f"{who} has {many} {thing}s and gives {few} away. How many are left?",
                f"{many} - {few} = {many - few}, so {many - few} {thing}s are left.",
            )
        elif number % 3 == 1:
            yield (
                f"{who} packs {times} boxes with {few} {thing}s each. How many {thing}s is that?",
                f"{times} x {few} = {times * few}, so {who} packs {times * few} {thing}s.",
            )
        else:
            yield (
                f"{who} shares {few * times} {thing}s equally among {times} people. How many does each get?",
                f"{few * times} / {times} = {few}, so each gets {few} {thing}s.",
            )


def _sums_zh(rng: random.Random) -> Iterator[Turn]:
    for number in range(40):
        who, (thing, _) = PEOPLE_ZH[number % len(PEOPLE_ZH)], THINGS_ZH[number % len(THINGS_ZH)]
        many, few, times = rng.randint(12, 60), rng.randint(2, 11), rng.randint(2, 9)
        if number % 2:
            yield (
                f"{who}有{many}个{thing}，又买了{few}个，现在一共有几个？",
                f"{many}加{few}等于{many + few}，一共有{many + few}个{thing}。",
            )
        else:
            yield (
                f"一个箱子能装{few}个{thing}，{who}装满了{times}箱，一共装了几个？",
                f"{few}乘{times}等于{few * times}，一共装了{few * times}个{thing}。",
            )


def _formats(rng: random.Random) -> Iterator[Turn]:
    for number in range(60):
        thing, colour = THINGS[number % len(THINGS)]
        price, count = rng.randint(3, 90), rng.randint(2, 40)
        said = f"{count} {colour} {thing}s at {price} euros each"
        value = {"product": thing, "colour": colour, "price": price, "count": count}
        if number % 3 == 0:
            asked = f"Give me this order as JSON with product, colour, price and count: {said}."
            yield asked, json.dumps(value)
        elif number % 3 == 1:
            yield (
                f"Write this order as one line of CSV (product;colour;price;count): {said}.",
                f"{thing};{colour};{price};{count}",
            )
        else:
            yield (
                f"Show this order as a Markdown table with two columns, field and value: {said}.",
                "| field | value |\n|---|---|\n" + "\n".join(f"| {name} | {what} |" for name, what in value.items()),
            )


def _formats_zh(rng: random.Random) -> Iterator[Turn]:
    for number in range(40):
        thing, colour = THINGS_ZH[number % len(THINGS_ZH)]
        price, count = rng.randint(3, 90), rng.randint(2, 40)
        said = f"{count}个{colour}色的{thing}，每个{price}元"
        if number % 2:
            value = {"商品": thing, "颜色": f"{colour}色", "单价": price, "数量": count}
            yield f"把这份订单写成JSON，键为商品、颜色、单价、数量：{said}。", json.dumps(value, ensure_ascii=False)
        else:
            yield (
                f"把这份订单分行列出商品、颜色、单价和数量：{said}。",
                f"商品：{thing}\n颜色：{colour}色\n单价：{price}元\n数量：{count}个",
            )


def _orders(rng: random.Random) -> Iterator[Turn]:
    """Requests that words be sorted, turned, counted and put into other forms."""
    for number in range(50):
        picked = rng.sample(WORDS, 3 + number % 3)
        said = ", ".join(picked)
        if number % 5 == 0:
            yield f"Sort these words by the alphabet, with commas: {said}.", ", ".join(sorted(picked))
        elif number % 5 == 1:
            yield f"Say these words in reverse order, with commas: {said}.", ", ".join(reversed(picked))
        elif number % 5 == 2:
            yield f"How many words are these: {said}?", f"These are {len(picked)} words."
        elif number % 5 == 3:
            longest = max(picked, key=lambda word: (len(word), word))
            if sum(len(word) == len(longest) for word in picked) == 1:
                yield f"Which of these words is the longest: {said}?", f"The longest of them is {longest}."
        else:
            yield f"Join these words with plus signs, without spaces: {said}.", "+".join(picked)
    for number in range(30):
        picked = rng.sample(WORDS_ZH, 3 + number % 3)
        said = "、".join(picked)
        if number % 3 == 0:
            yield f"把这些词倒过来说，用顿号分开：{said}。", "、".join(reversed(picked))
        elif number % 3 == 1:
            yield f"下面有几个词：{said}？", f"一共有{len(picked)}个词。"
        else:
            yield f"给每个词加上书名号：{said}。", "".join(f"《{word}》" for word in picked)


if __name__ == "__main__":
    write_whole(Path(sys.argv[1]), text())
