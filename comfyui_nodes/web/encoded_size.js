// The page's part of the node GPS Encode: a line that says how many tokens and bytes came out.

import {app} from "../../scripts/app.js";

const NODE = "GPSEncode";
const STYLE = "font: 12px/20px Inter, Arial, sans-serif; color: var(--descrip-text, #999); text-align: center;";
const HEIGHT = 20;

function addLine(node) {
    const line = Object.assign(document.createElement("div"), {className: "gps-encoded-size"});
    line.style.cssText = STYLE;
    const height = () => HEIGHT;
    const options = {serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height};
    node.addDOMWidget("encoded_size", "GPS_TEXT", line, options).serialize = false;
    return line;
}

app.registerExtension({
    name: "gpstoken.encoded_size",
    nodeCreated(node) {
        if (node.comfyClass !== NODE) return;
        const before = node.onExecuted;
        let line = null; // nothing before the first run
        node.onExecuted = function (output) {
            before?.apply(this, arguments);
            if (!output?.text?.length) return;
            line ??= addLine(node);
            line.textContent = output.text[0];
        };
    },
});
