"""fastmae.kernels: Triton kernels for CUDA, one file per op, with the file names of fastmae/ops/.

Names inside a kernel begin with what they are: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block of values. A
"program" is Triton's word for one instance of a kernel. The head of each file states the op's lower bound: the bytes
that have to be moved, or the arithmetic that has to be done.
"""
