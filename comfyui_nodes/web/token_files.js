// The page's part of the node Load GPS Tokens: files of this computer, by a button or dropped onto the node.

import {api} from "../../scripts/api.js";
import {app} from "../../scripts/app.js";

const NODE = "LoadGPSTokens";
const SUFFIX = ".safetensors";

/** Puts a file into ComfyUI's input folder, and gives the name by which the node knows it. */
async function upload(file) {
    const body = new FormData();
    body.append("image", file); // the only way in, whatever the file is
    const answer = await api.fetchApi("/upload/image", {method: "POST", body});
    if (answer.status !== 200) throw new Error(`${file.name}: ${answer.status} ${answer.statusText}`);
    const {name, subfolder} = await answer.json();
    return subfolder ? `${subfolder}/${name}` : name;
}

/** Uploads files of tokens; the node then loads the last of them. Gives whether there was one. */
async function take(node, files) {
    const chosen = [...files].filter(({name}) => name.endsWith(SUFFIX));
    const widget = node.widgets.find(({name}) => name === "file");
    try {
        for (const file of chosen) {
            const name = await upload(file);
            if (!widget.options.values.includes(name)) widget.options.values.push(name);
            widget.value = name;
            widget.callback?.(name);
        }
    } catch (error) {
        app.extensionManager.toast.add({severity: "error", summary: "Load GPS Tokens", detail: error.message});
    }
    node.graph?.setDirtyCanvas(true, true);
    return chosen.length > 0;
}

app.registerExtension({
    name: "gpstoken.token_files",
    nodeCreated(node) {
        if (node.comfyClass !== NODE) return;
        const chooser = Object.assign(document.createElement("input"), {type: "file", accept: SUFFIX, multiple: true});
        chooser.addEventListener("change", () => {
            take(node, chooser.files);
            chooser.value = ""; // the same file may be chosen again
        });
        const button = node.addWidget("button", "upload", null, () => chooser.click(), {serialize: false});
        button.label = "choose file to upload";
        button.serialize = false;
        node.onDragOver = ({dataTransfer}) => [...(dataTransfer?.items ?? [])].some(({kind}) => kind === "file");
        node.onDragDrop = ({dataTransfer}) => take(node, dataTransfer.files);
    },
});
