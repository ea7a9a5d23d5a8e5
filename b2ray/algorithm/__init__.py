"""The paper in numpy: intervals, branches, selection, replay and costs. Neither Ray nor torch."""
