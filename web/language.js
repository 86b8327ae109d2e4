// @ts-check
// Has the page's texts speak its language: translations come from the server, which reads them from locales/.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { speak } from "./strings.js";

app.registerExtension({
  name: "flowcache.language",
  async init() {
    try {
      const answer = await api.fetchApi("/i18n");
      const all = answer.ok ? await answer.json() : {};
      speak(() => all[app.extensionManager.setting.get("Comfy.Locale")]?.flowcache);
    } catch (error) {
      console.debug("FlowCache: the host's translations cannot be read, so texts stay English", error);
    }
  },
});
