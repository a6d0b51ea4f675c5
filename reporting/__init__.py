"""What `report.py` is made of: run folders, what stands in tables, charts, and the page."""
