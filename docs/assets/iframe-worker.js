// Search without a server. A browser starts no worker for a page that was opened from a disk (file://), so there the
// script of the search runs in a hidden frame, which answers to the part of Worker that the search uses.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.scope = new Promise((started) => {
        frame.onload = () => {
          frame.onload = null
          const scope = frame.contentWindow
          scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = scope.document.createElement("script")
          script.onload = () => started(scope)
          script.src = url
          scope.document.body.append(script)
        }
      })
      document.body.append(frame)
    }

    postMessage(data) {
      this.scope.then((scope) => scope.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
