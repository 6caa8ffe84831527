"""What a job's proof came to.

Written out, not imported from tables.py: a migration stays as it was when tables.py goes on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("proof", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "proof")
