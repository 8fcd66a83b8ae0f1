"""What factorize is made of: which neurons go together by their weights (`partition`), by the text that they are active
on (`activity`, `co_activation`, `co_activation_graph`) and by the loss (`importance`); `division` chooses among them,
of heads `heads` does; `blocks` cuts dense blocks and experts.
"""
