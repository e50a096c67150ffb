"""The operators of csm_fast, one per file: contract, form in PyTorch's operators, registration and gradients.

``gpu`` has the Triton kernels, ``cpu`` the forms for CPUs; neither imports the other. ``choice`` says which one runs.
Imports only torch, numpy and, for the kernels, triton.
"""
