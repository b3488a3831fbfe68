/* Search runs in a worker, which browsers refuse to pages opened from a folder (file:).
   There, and only there, an empty frame stands in for the worker. */
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.append(frame)
    this.inner = frame.contentWindow
    this.inner.postMessage = data => setTimeout(() => {
      const e = new MessageEvent("message", {data: structuredClone(data)})
      this.dispatchEvent(e)
      if (this.onmessage) this.onmessage(e)
    })
    this.ready = new Promise(resolve => {
      const script = this.inner.document.createElement("script")
      script.src = url
      script.onload = resolve
      this.inner.document.body.append(script)
    })
  }
  postMessage(data) {
    this.ready.then(() => setTimeout(() => this.inner.dispatchEvent(new MessageEvent("message", {data: structuredClone(data)}))))
  }
  terminate() { this.inner.frameElement.remove() }
}
