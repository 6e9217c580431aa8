// Wires the page together: which view is shown, the colours, the connection.

import { setUpChat } from "./chat.js";
import { connect, setUpKey } from "./connection.js";
import { setUpDashboard } from "./dashboard.js";
import { byId } from "./dom.js";

const VIEWS = ["chat", "dashboard"];

function setUpTheme() {
  const select = byId("theme");
  select.value = document.documentElement.dataset.theme || "auto";
  select.addEventListener("change", () => {
    const chosen = select.value;
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    try { localStorage.setItem("gqa-serve-theme", chosen); } catch { /* it holds until the page is left */ }
    document.dispatchEvent(new Event("themechange"));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    document.dispatchEvent(new Event("themechange"));
  });
}

function setUpViews(dashboard) {
  const show = () => {
    const wanted = location.hash.slice(1);
    const view = VIEWS.includes(wanted) ? wanted : "chat";
    for (const name of VIEWS) {
      byId(name).hidden = name !== view;
      if (name === view) byId("to-" + name).setAttribute("aria-current", "page");
      else byId("to-" + name).removeAttribute("aria-current");
    }
    document.title = view === "chat" ? "Chat – gqa-serve" : "Dashboard – gqa-serve";
    dashboard.look(view === "dashboard" && !document.hidden);
  };
  window.addEventListener("hashchange", show);
  document.addEventListener("visibilitychange", show);  // nobody looks: nothing is asked
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();  // the fragment names the view
    byId("main").focus();
  });
  show();
}

setUpTheme();
setUpKey();
setUpChat();
setUpViews(setUpDashboard());
connect();
