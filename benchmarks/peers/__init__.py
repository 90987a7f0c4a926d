"""Offramp beside what a user would pick instead: the same model code in six other servers, measured in one run."""
