"""The transaction: observe, baseline, propose, search, trial, commit, receipt, recipe.

Read `kpt.transaction.api` first; each stage is one module, named after it.
"""
