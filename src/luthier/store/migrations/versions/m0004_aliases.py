"""What the gate says of models, and the moves of aliases.

Written out, not imported from tables.py: a migration stays as it was when tables.py goes on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "gates",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("passed", sa.Integer(), nullable=False),
        sa.Column("reasons", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="fk_gates_model_models", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("model", name="pk_gates"),
    )
    op.create_table(
        "alias_moves",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("by", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_alias_moves"),
        sa.UniqueConstraint("alias", "version", name="uq_alias_moves_alias_version"),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    op.drop_table("alias_moves")
    op.drop_table("gates")
