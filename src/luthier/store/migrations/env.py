"""Alembic's way in: the connection that Database.migrate opened, whose one transaction holds every step."""

from alembic import context

from luthier.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
