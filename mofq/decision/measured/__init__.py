"""From a table, budgets and the model itself to a recipe: what measuring adds to `decide`."""
