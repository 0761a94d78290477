"""A stock AgentApp: it asks Flower's Runtime for a model, and knows nothing of federations."""

import os

import httpx
from flwr.agentapp import AgentApp

app = AgentApp()


@app.main()
def main(agent, context):
    # Flower gives both to every AgentApp; the key is this task's, not the gateway's.
    reply = httpx.post(
        f"{os.environ['FLWR_RUNTIME_BASE_URL']}/responses",
        headers={"Authorization": f"Bearer {os.environ['FLWR_RUNTIME_API_KEY']}"},
        json={"model": context.run_config["model"], "input": agent.prompt},
        timeout=300.0,
    )
    reply.raise_for_status()
    response = reply.json()
    text = response["output"][-1]["content"][0]["text"]
    agent.events.emit(
        {
            "type": "message",
            "role": "assistant",
            "content": text,
            "provenance": response["fedinfer"]["provenance"],
        }
    )
