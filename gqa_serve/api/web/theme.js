// Sets the chosen colours before anything is drawn: a module would come too late and flash.
"use strict";
try {
  const chosen = localStorage.getItem("gqa-serve-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is switched off; the system's preference holds.
}
