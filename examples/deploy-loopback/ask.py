"""Ask the federation with the OpenAI SDK, as one would ask any model server."""

import os
import sys

import httpx
from openai import OpenAI

url, ca = sys.argv[1:]
client = OpenAI(
    base_url=f"{url}/v1",
    api_key=os.environ["FEDINFER_API_KEY"],
    http_client=httpx.Client(verify=ca),
)
question = {"role": "user", "content": "Q city of doriz gufag ?"}

answer = client.chat.completions.create(model="assistant", messages=[question])
sys.stdout.write(f"chat:      {answer.choices[0].message.content}\n")

for event in client.responses.create(model="assistant", input=question["content"], stream=True):
    if event.type == "response.output_text.done":
        sys.stdout.write(f"responses: {event.text}\n")
