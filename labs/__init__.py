"""Teaching code for the book: each module is one chapter's subject, read beside its man page.

Import modules, not names: ``from labs import container``.  Nothing is imported here, so that
a program pays only for the modules it uses.
"""
