"""The version of the definitions by which mofq measures and fits."""

from __future__ import annotations

#: Of the errors in a table, and of the codes of schemes that are fitted to statistics; raised with
#: every change of how they are computed. Rows and codes of two numbers are not mixed.
#:
#: 1  Labels sampled from the model; layers that read one input treated as independent; the kept
#:    sequences alone. Tables and recipes without a number were written before 2, under this one.
#: 2  Random signs in the place of labels; what layers of one input lose together; the gains of all
#:    sequences that were run; GPTQ's Hessian weighs tokens by the norm of their gradients, and is
#:    damped by a tenth.
#: 3  What a change of size of all weights does is added up over rows and layers before it is
#:    squared, and over the groups of a recipe; experts of one token are rounded once; draws of one
#:    sequence are one sample; the output error of an expert counts by its tokens.
#: 4  Errors of the weights of fitted schemes, and their change of size, are the mean over the fits
#:    to either half, and not those of the fit to all.
NUMERICS = 4

#: Earlier numbers under which codes are fitted alike; but that Hessians are summed in another order
#: since 4, so that a code at a tie may be another where it is fitted again.
EARLIER_FITTED_CODES = (3, 2)
