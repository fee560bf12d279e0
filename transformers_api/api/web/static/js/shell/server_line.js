// The dots and the line at the foot of the side: how the server is, in words.
import { byId } from "../core/dom.js";
import { bytes, duration } from "../core/format.js";
import { on, state } from "../core/state.js";
import { common } from "../words/common.js";

function shown() {
  const { status, reach } = state;
  const { resident, loading } = status ?? {};
  if (reach === "no") return ["off", common.noConnection, common.tryingAgain];
  if (!status) return ["wait", common.connecting, ""];
  if (loading) return ["busy", common.loading, common.loadingMore(loading.model, loading.progress)];
  if (!resident) return ["wait", common.noModel, common.noModelMore];
  const more = common.served(resident.bytes ? bytes(resident.bytes) : "", resident.device, status.uptime_s ? duration(status.uptime_s) : "");
  return [resident.draining ? "busy" : "ready", resident.running ? common.writing(resident.running) : common.ready, more];
}

function draw() {
  const [dot, line, more] = shown();
  byId("served-dot").dataset.state = dot;
  byId("model-dot").dataset.state = dot;
  byId("served-state").textContent = line;
  byId("served-more").textContent = more || "\u00a0";
  byId("bar").hidden = !state.status?.loading || state.reach === "no";
}

export function start() {
  on("status", draw);
  on("reach", draw);
  draw();
}
