"""The remote code of a MEO model: every converted repository carries these files."""
