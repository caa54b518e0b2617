"""The native CPU kernels: their build, the torch operators and the C++ they share."""
