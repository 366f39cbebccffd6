"""HTTP server for one model with the OpenAI API (completions and chat) and continuous batching.

`app` defines the routes, `protocol` parses requests, `replies` builds responses, and `worker` runs the model in a thread.
"""
