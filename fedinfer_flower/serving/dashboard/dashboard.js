// Asks /v1/status every two seconds and draws what comes. Names and words of sites and errors
// are other people's: they become text nodes, never markup.
"use strict";
(() => {
  const POLL_MS = 2000, CALL_MS = 6000, STALE_MS = 7000, SLOT = "fedinfer-key", SAMPLES = 240;
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);
  const history = new Map();
  let key = sessionStorage.getItem(SLOT) || "";
  let timer = 0, turn = 0, arrivedAt = 0, why = "";

  // -- values out of a reply: anything may be missing, or of another type ------------------
  const list = (v) => (Array.isArray(v) ? v : []);
  const table = (v) => (v && typeof v === "object" && !Array.isArray(v) ? v : {});
  const num = (v) => (typeof v === "number" && Number.isFinite(v) ? v : 0);
  const text = (v) => (typeof v === "string" ? v : typeof v === "number" ? String(v) : "");
  const count = (v) => Math.round(num(v)).toLocaleString("en");
  const brief = (v, n = 12) => (text(v).length > n + 2 ? text(v).slice(0, n) + "…" : text(v));
  const many = (v, word) => `${count(v)} ${word}${Math.round(num(v)) === 1 ? "" : "s"}`;
  const amount = (v) => num(v).toLocaleString("en", { maximumSignificantDigits: 3 });
  const clock = (s) => (num(s) ? new Date(num(s) * 1000).toLocaleTimeString([], { hour12: false }) : "–");

  function ago(seconds) {
    const s = Math.max(0, Math.round(seconds));
    if (s < 60) return `${s} s`;
    if (s < 5400) return `${Math.round(s / 60)} min`;
    if (s < 129600) return `${Math.round(s / 3600)} h`;
    return `${Math.round(s / 86400)} days`;
  }
  function latency(s) {
    if (typeof s !== "number" || !Number.isFinite(s) || s <= 0) return "–";
    return s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`;
  }

  // -- small builders ---------------------------------------------------------------------
  function el(tag, { cls = "", words = "" } = {}, ...children) {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (words) node.textContent = words;
    node.append(...children);
    return node;
  }
  function shape(tag, attributes, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  function named(words) {
    const node = document.createElementNS(SVG, "title");
    node.textContent = words;
    return node;
  }
  function fill(id, nodes, empty) {
    const inner = nodes.length ? nodes : [emptyFor($(id), empty)];
    $(id).replaceChildren(...inner);
  }
  function emptyFor(parent, words) {
    if (parent.tagName === "TBODY") {
      const cell = el("td", { cls: "empty", words });
      cell.colSpan = 4;
      return el("tr", {}, cell);
    }
    return el(parent.tagName === "DIV" ? "p" : "li", { cls: "empty", words });
  }
  function meter(share, cls) {
    const width = (100 * Math.min(1, Math.max(0, share))).toFixed(2);
    return el("div", { cls: "track" }, shape("svg", { height: "8", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
      shape("rect", { class: cls, width, height: "8" })));
  }

  // -- parts of the page --------------------------------------------------------------------
  function drawSites(sites, now) {
    fill("sites", sites.map((site) => {
      const up = site.online === true, seen = num(site.last_seen_at);
      const name = el("td", { words: text(site.name) || "unnamed" });
      name.append(el("span", { cls: "soft mono", words: brief(site.key_id) }));
      const state = el("td", {}, el("span", { cls: up ? "up" : "down", words: up ? "up" : "down" }));
      state.append(el("span", { cls: "soft", words: seen ? `${ago(now - seen)} ago` : "never seen" }));
      const answers = el("td", { cls: "n", words: count(site.answers) });
      if (num(site.failures)) answers.append(el("span", { cls: "soft", words: `${count(site.failures)} failed` }));
      return el("tr", {}, name, state, el("td", { cls: "n", words: up ? latency(site.latency_s) : "–" }), answers);
    }), "No site has come online yet.");
  }

  function drawQueries(values) {
    if (!values.length) return fill("queries", [], "No figures yet.");
    const n = values.length, top = nice(Math.max(1, ...values)), total = values.reduce((a, b) => a + b, 0);
    const chart = shape("svg", { class: "chart", viewBox: `0 0 ${n * 10} 100`, preserveAspectRatio: "none", role: "img",
      "aria-label": `${count(total)} queries in the last ${n} minutes, at most ${count(Math.max(...values))} in one minute` });
    for (const y of [0.25, 50, 99.75]) chart.append(shape("line", { x1: 0, x2: n * 10, y1: y, y2: y }));
    values.forEach((value, i) => {
      const height = (100 * value) / top, minutes = n - 1 - i;
      chart.append(shape("rect", { class: minutes ? "bar" : "bar now", x: i * 10 + 1.5, width: 7, y: 100 - height, height },
        named(`${count(value)} queries, ${minutes ? `${minutes} min ago` : "this minute"}`)));
    });
    const marks = [["y2", top], ["y1", top / 2], ["y0", 0]].map(([cls, v]) => el("span", { cls: `mark-y soft ${cls}`, words: amount(v) }));
    const area = el("div", { cls: "plot area" }, chart, ...marks);
    const axis = el("div", { cls: "plot" }, el("div", { cls: "axis soft" },
      el("span", { words: `${n} min ago` }), el("span", { words: `${Math.round(n / 2)} min ago` }), el("span", { words: "now" })));
    $("queries").replaceChildren(area, axis);
  }
  function nice(v) {
    const power = 10 ** Math.floor(Math.log10(v));
    const step = [1, 2, 4, 6, 8, 10].find((s) => s * power >= v) * power;
    return Math.max(2, step);
  }

  function drawMix(protections) {
    const parts = Object.entries(protections).map(([name, rows]) => [name, num(rows)]).filter(([, r]) => r > 0).sort((a, b) => b[1] - a[1]);
    const total = parts.reduce((sum, [, rows]) => sum + rows, 0);
    if (!total) return fill("mix", [], "No rows have been answered yet.");
    const share = (rows) => `${(100 * rows / total).toFixed(rows / total < 0.1 ? 1 : 0)} %`;
    const bar = shape("svg", { viewBox: "0 0 100 22", height: "22", preserveAspectRatio: "none", role: "img",
      "aria-label": parts.map(([name, rows]) => `${name} ${share(rows)}`).join(", ") });
    let x = 0;
    parts.forEach(([name, rows], i) => {
      const width = (100 * rows) / total;
      bar.append(shape("rect", { class: `f${i % 6}`, x: x.toFixed(3), width: Math.max(0.4, width - 0.4).toFixed(3), height: 22 }, named(`${name}: ${share(rows)}`)));
      x += width;
    });
    const legend = el("ul", { cls: "legend" }, ...parts.map(([name, rows], i) => el("li", {}, el("i", { cls: `f${i % 6}` }),
      el("b", { words: name }), el("span", { words: share(rows) }), el("span", { cls: "soft", words: many(rows, "row") }))));
    $("mix").replaceChildren(el("div", { cls: "stack" }, bar), legend);
  }

  function left(entry) {
    const cap = num(entry.cap);
    return cap > 0 ? Math.max(0, (cap - num(entry.spent)) / cap) : null;
  }
  function remember(entries, now) {
    const seen = new Set();
    for (const entry of entries) {
      const name = `${text(entry.site)}\u0000${text(entry.querier)}`, value = left(entry);
      if (value === null) continue;
      seen.add(name);
      const past = history.get(name) || [];
      past.push([now, value]);
      history.set(name, past.slice(-SAMPLES));
    }
    for (const name of history.keys()) if (!seen.has(name)) history.delete(name);
  }
  function spark(past) {
    const from = past[0][0], span = past[past.length - 1][0] - from;
    const high = Math.max(...past.map(([, v]) => v)), low = Math.min(...past.map(([, v]) => v));
    if (span <= 0 || high - low < 1e-9) return null;
    const points = past.map(([at, v]) => `${(100 * (at - from) / span).toFixed(1)},${(1 + 20 * (high - v) / (high - low)).toFixed(1)}`);
    return shape("svg", { class: "spark", viewBox: "0 0 100 22", preserveAspectRatio: "none", role: "img",
      "aria-label": `from ${amount(100 * past[0][1])} to ${amount(100 * past[past.length - 1][1])} per cent left since this page was opened` },
    shape("polyline", { points: points.join(" ") }));
  }
  function drawEpsilon(entries) {
    const order = entries.slice().sort((a, b) => (left(a) ?? 2) - (left(b) ?? 2) || num(b.spent) - num(a.spent));
    const most = Math.max(1e-9, ...entries.map((e) => num(e.spent)));
    const capped = order.some((e) => left(e) !== null);
    $("h-epsilon-words").textContent = capped || !order.length ? "Privacy budget left" : "Privacy budget spent";
    fill("epsilon", order.map((entry) => {
      const share = left(entry), spent = num(entry.spent), cap = num(entry.cap);
      const who = el("span", { words: text(entry.site) });
      who.append(el("span", { cls: "soft mono", words: ` ${brief(entry.querier, 10)}` }));
      const words = share === null ? `${amount(spent)} spent` : `${amount(Math.max(0, cap - spent))} of ${amount(cap)}`;
      const item = el("li", {}, el("div", { cls: "row" }, who, el("span", { words })));
      if (share === null) {
        item.append(meter(spent / most, "f2"));
      } else {
        item.append(meter(share, share < 0.2 ? "low" : "f1"));
        const past = history.get(`${text(entry.site)}\u0000${text(entry.querier)}`);
        const line = past && past.length > 2 ? spark(past) : null;
        if (line) item.append(line);
      }
      return item;
    }), "No answer has spent privacy budget.");
  }

  function drawRewards(rewards) {
    const order = rewards.slice().sort((a, b) => num(b.credits) - num(a.credits));
    const total = order.reduce((sum, r) => sum + Math.max(0, num(r.credits)), 0);
    fill("rewards", order.map((reward) => {
      const share = total ? num(reward.credits) / total : 0;
      const value = el("span", { words: amount(reward.credits) });
      value.append(el("span", { cls: "soft", words: `  ${Math.round(100 * share)} %` }));
      return el("li", {}, el("div", { cls: "row" }, el("span", { words: text(reward.site) }), value), meter(share, "f0"));
    }), "No rewards: the gateway keeps no ledger, or nothing was settled.");
  }

  function drawModels(models) {
    fill("models", models.map((model) => {
      const name = el("td", { words: text(model.id) });
      name.append(el("span", { cls: "soft", words: text(model.kind) }));
      const protection = el("td", { words: text(model.protection) || "–" });
      protection.append(el("span", { cls: "soft", words: text(model.rule) }));
      const jobs = el("td", { cls: "n", words: count(model.jobs) });
      if (num(model.failed)) jobs.append(el("span", { cls: "soft bad", words: `${count(model.failed)} failed` }));
      return el("tr", {}, name, protection, jobs);
    }), "No models.");
  }

  function drawErrors(errors) {
    fill("errors", errors.map((error) => {
      const head = el("p", {}, el("span", { cls: "code", words: text(error.code) || "error" }));
      head.append(el("span", { cls: "soft", words: `  ${clock(error.at)}` + (error.job_id ? `  job ${brief(error.job_id, 8)}` : "") }));
      return el("li", {}, head, el("p", { words: brief(error.message, 300) }));
    }), "None.");
  }

  function drawReceipts(receipts) {
    fill("receipts", receipts.map((receipt) => {
      const sites = Array.isArray(receipt.sites) ? receipt.sites.map(text).join(", ") : many(receipt.sites, "site");
      const head = el("p", {}, el("span", { cls: "mono", words: brief(receipt.job_id, 16) }));
      head.append(el("span", { cls: "soft", words: `  ${clock(receipt.at)}` }));
      const line = el("p", { cls: "soft cut", words: `${many(receipt.n_rows, "row")}, signed by ${brief(sites, 300)}` });
      line.title = brief(sites, 300);
      return el("li", {}, head, line);
    }), "None yet.");
  }

  function drawBudgetTile(entries) {
    const tight = entries.filter((e) => left(e) !== null).sort((a, b) => left(a) - left(b))[0];
    const most = entries.slice().sort((a, b) => num(b.spent) - num(a.spent))[0];
    if (tight) {
      $("t-eps-name").textContent = "Tightest budget";
      $("t-eps").textContent = `${Math.round(100 * left(tight))} %`;
      $("t-eps-sub").textContent = `left at ${brief(tight.site, 60)}`;
      return;
    }
    // A cap is the site's own: where the gateway does not know it, what was spent is all there is.
    $("t-eps-name").textContent = "Most ε spent";
    $("t-eps").textContent = most ? amount(most.spent) : "–";
    $("t-eps-sub").textContent = most ? `at ${brief(most.site, 60)}` : "no answer has spent any";
  }

  function drawTiles(status, now) {
    const gateway = table(status.gateway), sites = list(status.sites), up = sites.filter((s) => s.online === true);
    const minutes = list(status.queries_a_minute).map(num);
    $("t-sites").textContent = `${up.length} of ${sites.length}`;
    const times = up.map((s) => num(s.latency_s)).filter((s) => s > 0).sort((a, b) => a - b);
    $("t-sites-sub").textContent = times.length ? `median latency ${latency(times[Math.floor((times.length - 1) / 2)])}` : "";
    $("t-queries").textContent = count(minutes.reduce((a, b) => a + b, 0));
    $("t-queries-sub").textContent = minutes.length ? `${count(minutes[minutes.length - 1])} this minute` : "";
    $("t-rows").textContent = count(gateway.queue_rows);
    $("t-rows-sub").textContent = num(gateway.queue_rows) ? "accepted, not answered" : "nothing waits";
    drawBudgetTile(list(status.epsilon).map(table));
    $("name").textContent = text(gateway.name) || "Federation";
    document.title = text(gateway.name) || "Federation";
    const started = num(gateway.started_at);
    $("about").textContent = [gateway.version && `release ${text(gateway.version)}`, started && `up ${ago(now - started)}`].filter(Boolean).join(" · ");
  }

  function draw(status) {
    const now = Date.now() / 1000, gateway = table(status.gateway);
    remember(list(status.epsilon).map(table), now);
    drawTiles(status, now);
    drawSites(list(status.sites).map(table), now);
    drawQueries(list(status.queries_a_minute).map(num));
    drawMix(table(status.protections));
    drawEpsilon(list(status.epsilon).map(table));
    drawRewards(list(status.rewards).map(table));
    drawModels(list(status.models).map(table));
    drawErrors(list(status.errors).map(table));
    drawReceipts(list(status.receipts).map(table));
    why = gateway.ready === true ? "" : text(gateway.why) || "it does not say why";
  }

  // -- asking -------------------------------------------------------------------------------
  function say(words, cls) {
    if ($("state").textContent !== words) $("state").textContent = words;
    $("state").className = `pill ${cls}`;
  }
  function warn(words) {
    $("banner").hidden = !words;
    if ($("banner").textContent !== words) $("banner").textContent = words;
  }
  function judge(failure) {
    const age = Date.now() - arrivedAt;
    const stale = Boolean(failure) && (!arrivedAt || age > STALE_MS);
    $("board").classList.toggle("stale", stale);
    if (!failure) {
      say(why ? "Not ready" : "Ready", why ? "warn" : "good");
      warn(why ? `Queries are not answered now: ${brief(why, 300)}` : "");
    } else if (stale) {
      say("No contact", "bad");
      warn(arrivedAt ? `${failure} These figures are ${ago(age / 1000)} old. Trying again.` : `${failure} Trying again.`);
    } else {
      say("Reconnecting", "warn");
    }
  }

  async function ask() {
    const mine = ++turn, stop = new AbortController(), limit = setTimeout(() => stop.abort(), CALL_MS);
    try {
      const reply = await fetch("/v1/status", {
        headers: { Authorization: `Bearer ${key}` }, signal: stop.signal,
        cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer",
      });
      if (mine !== turn) return;
      if (reply.status === 401 || reply.status === 403) {
        return leave(reply.status === 401 ? "The gateway does not know this key." : "This key does not have the scope “status”.");
      }
      if (!reply.ok) return judge(`The gateway answers with status ${reply.status}.`);
      const body = await reply.text();
      if (mine !== turn) return;
      const status = JSON.parse(body);
      arrivedAt = Date.now();
      $("board").hidden = false;
      draw(status);
      judge("");
    } catch (error) {
      if (mine === turn) judge(error instanceof SyntaxError ? "The gateway's reply cannot be read." : "The gateway does not answer.");
    } finally {
      clearTimeout(limit);
      if (mine === turn && key) timer = setTimeout(ask, POLL_MS);
    }
  }

  function enter(given) {
    key = given;
    sessionStorage.setItem(SLOT, key);
    $("enter").hidden = true;
    $("forget").hidden = false;
    $("key").value = "";
    say("Connecting", "warn");
    clearTimeout(timer);
    ask();
  }
  function leave(words) {
    turn += 1;
    clearTimeout(timer);
    key = "";
    arrivedAt = 0;
    history.clear();
    sessionStorage.removeItem(SLOT);
    $("board").hidden = true;
    $("forget").hidden = true;
    $("enter").hidden = false;
    $("key-error").textContent = words;
    say("Not connected", "");
    warn("");
    $("key").focus();
  }

  $("enter").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = $("key").value.trim();
    // What is no key would be refused as a header, with an error that says less.
    if (!/^[\x21-\x7e]{1,256}$/.test(given)) { $("key-error").textContent = "That is no API key."; return; }
    $("key-error").textContent = "";
    enter(given);
  });
  $("forget").addEventListener("click", () => leave(""));
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && key) { clearTimeout(timer); ask(); }
  });
  if (key) enter(key); else { $("enter").hidden = false; $("key").focus(); }
})();
