"""What a job's model forgot, and whether it kept to its thresholds.

Written out, not imported from tables.py: a migration stays as it was when tables.py goes on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("forgetting", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("gate", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "gate")
    op.drop_column("jobs", "forgetting")
