const slider = document.getElementById("epoch");
if (slider) {
  const epochs = slider.dataset.epochs.split(",").map(Number);
  const show = () => {
    const epoch = epochs[slider.value];
    document.getElementById("epoch-shown").textContent = epoch;
    for (const strip of document.querySelectorAll(".strip")) {
      const pictures = [...strip.querySelectorAll("img")];
      const newest = pictures.filter((picture) => Number(picture.dataset.epoch) <= epoch).pop() || pictures[0];
      for (const picture of pictures) picture.hidden = picture !== newest;
      strip.querySelector(".of-epoch").textContent = newest.dataset.epoch;
    }
  };
  slider.addEventListener("input", show);
  document.getElementById("slider").hidden = false;
  show();
}
