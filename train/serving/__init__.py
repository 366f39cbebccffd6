"""A server that speaks OpenAI's protocol: completions and chat from one model, whose requests share its batches.

`app` has the routes, `protocol` reads requests, `replies` writes answers, `worker` runs the model in a thread of its own.
"""
