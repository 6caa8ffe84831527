"""One process each: a trainer carries out one job. They run in the trainers' own environments."""
