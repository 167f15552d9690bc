"""The figures of a report: pure functions from a table, in the shape that the probe writes it in, to a `Figure`.

No model, no pyplot state, no clock; `plotting.to_svg` turns a figure into the same text every time. Effects are in
nats/token, and so is `margin`, the equivalence margin, which is drawn as a band. `title` is the name of the model or of
the training.
"""
