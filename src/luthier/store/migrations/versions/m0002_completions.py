"""Stored chat completions and the metadata that they are found by.

Written out, not imported from tables.py: a migration stays as it was when tables.py goes on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "stored_completions",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("completion", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_stored_completions"),
        sa.UniqueConstraint("id", name="uq_stored_completions_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "completion_tags",
        sa.Column("completion_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["completion_id"],
            ["stored_completions.id"],
            name="fk_completion_tags_completion_id_stored_completions",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("completion_id", "key", name="pk_completion_tags"),
    )


def downgrade() -> None:
    op.drop_table("completion_tags")
    op.drop_table("stored_completions")
