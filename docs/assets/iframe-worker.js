// browsers start no worker from a file: there the search runs in a hidden frame, which speaks as a worker does
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = frame.contentWindow
      this.inside = inside
      // what is said before the script is there waits for it
      this.ready = new Promise((resolve, reject) => {
        const script = inside.document.createElement("script")
        script.onload = resolve
        script.onerror = reject
        script.src = url
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        inside.importScripts = (...files) => files.reduce(
          (before, file) => before.then(() => new Promise((done, failed) => {
            const more = inside.document.createElement("script")
            more.onload = done
            more.onerror = failed
            more.src = file
            inside.document.body.appendChild(more)
          })),
          Promise.resolve()
        )
        inside.document.body.appendChild(script)
      })
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }
}
