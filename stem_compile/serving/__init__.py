"""Sparse prefill where no Dynamo backend sees the attention: interfaces of other libraries, one file each."""
