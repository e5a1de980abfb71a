"""Several strategies on one problem: the same space, budget, evaluator and seeds."""
