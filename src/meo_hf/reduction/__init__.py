"""Fewer experts: a method decides on a plan, one function applies it."""
