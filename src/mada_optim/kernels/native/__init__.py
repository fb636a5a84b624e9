"""The families of MADA and OMADA in closed form, in C++, for the CPU."""
