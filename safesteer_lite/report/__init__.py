"""The report for people: one page a run, without scripts or requests.

Read in order: `page` (what is written, and in which order), `source` (what it is made from), `parts` (one function a part),
`charts` and `markup` (drawings and elements that no text can break). `picture` is before and after alone, for other pages.
"""
