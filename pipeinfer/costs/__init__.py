"""The cost model: hardware descriptions, model shapes, and the time of a pass (roofline)."""
