"""Stored chat completions and the tags that they are found by."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "completions",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.Column("owner", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("messages", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_completions"),
        sa.UniqueConstraint("id", name="uq_completions_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_completions_model", "completions", ["model"], unique=False)
    op.create_table(
        "completion_tags",
        sa.Column("completion_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["completion_id"], ["completions.id"], name="fk_completion_tags_completion_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("completion_id", "key", name="pk_completion_tags"),
    )


def downgrade() -> None:
    op.drop_table("completion_tags")
    op.drop_table("completions")
