"""Structured output: what a request's grammar is, whether it may be compiled, and what each stream may say next.

frontend: looks at sizes ──Submit.grammar──► loop: Grammars ──► Compiler ──► checker, a process that may be killed
engine: Verdict, Matched ◄── Matcher, one a stream ──► Mask ──► worker
"""
