"""`python -m config > docs/settings.md`: every flag, its default and its meaning, as tables."""

from config import settings_page

print(settings_page())
