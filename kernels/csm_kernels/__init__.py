"""The operators of csm_fast, one per file. Imports only torch (and triton, where a kernel needs it)."""
