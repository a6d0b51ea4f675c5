"""How local data sets are made: behavior policies, a batched simulator, and rollouts written in D4RL's layout."""
