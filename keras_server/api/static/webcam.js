// A photo by the camera of a desktop; phones have a better way, their own camera's.

import { $ } from "./words.js";

export const hasWebcam = () => matchMedia("(hover: hover) and (pointer: fine)").matches && !!navigator.mediaDevices;
let taken = 0;

/** Show what the camera sees; `take` gets the photo. */
export async function openWebcam(take) {
  const [dialog, video] = [$("webcam"), $("video")];
  let stream = null;
  $("webcam-why").textContent = "Waiting for the camera…";
  $("snap").disabled = true;
  $("snap").onclick = () => snap(video, dialog, take);
  dialog.showModal();
  dialog.addEventListener(
    "close",
    () => {
      for (const track of stream?.getTracks() ?? []) track.stop();
      video.srcObject = null;
    },
    { once: true },
  );
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
    if (!dialog.open) return stream.getTracks().forEach((track) => track.stop());
    video.srcObject = stream;
    await video.play();
    $("webcam-why").textContent = "";
    $("snap").disabled = false;
    $("snap").focus();
  } catch (error) {
    $("webcam-why").textContent =
      error.name === "NotAllowedError"
        ? "The browser does not allow this page the camera: allow it beside the address."
        : "No camera can be used: there is none, or another program has it.";
  }
}

async function snap(video, dialog, take) {
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  dialog.close();
  const name = `webcam-${(taken += 1)}.jpg`;
  take({ files: [[new File([blob], name, { type: "image/jpeg" }), name]], leftOut: 0 });
}
