"""`python -m config`: the README's tables of settings."""

from config import readme_table

print(readme_table())
