"""An address that answers over HTTP: the requests and replies of OpenAI's API, and the thread that decodes."""
