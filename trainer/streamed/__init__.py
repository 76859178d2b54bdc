"""The streamed executor: each layer in three passes, so that nothing of length S × width is ever on the card at once.

`split` takes a transformers decoder apart at its attention call, `kernels` and `tiles` compute attention of some heads
over a whole sequence, `arrays` and `transfers` hold what is as long as the sequence in host memory and move it,
`checkpoints` keeps the layers' inputs, `layer` is one layer forward and backward, `loss` the whole step.
"""
