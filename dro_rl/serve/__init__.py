"""A trained pair behind HTTP, and its selector over files of rankings.

settings      how much the server takes, and for how long
refusals      what a client is told that is not answered
schemas       requests and responses, as vLLM, Jina, Cohere and OpenAI clients speak them
requests      from a request to what is asked of the pair, and back
ranking       the order and the scores that a selection gives
work          the pair at work on a batch
batching      one thread that has the models, and the queue before it
limits        size, rate and time, before a request is read by anything else
metrics       what is counted
app           the routes
connections   connections that send nothing, and the stop that loses nothing: uvicorn's part
page          a page to ask by hand
serving       all of it together
ranked_files  the selector over files of rankings, without a server
"""
