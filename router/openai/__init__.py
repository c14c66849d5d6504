"""OpenAI's API in JSON: what clients send becomes a GenerateRequest, what comes back becomes their objects and events. Pure.

requests.py    JSON to messages of inference.proto, which the one validator then checks
answers.py     GenerateResponses to completions and chunks
errors.py      the error tree to status codes and error objects
"""
