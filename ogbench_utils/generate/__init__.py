"""How local data sets of OGBench's mazes are made: its scripted controller, and the policy that walks the ant."""
