"A headless Chromium for tests, spoken to over two pipes: no driver and no package is needed"
import base64, fcntl, json, os, select, shutil, subprocess, tempfile, time

FLAGS = '''--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --hide-scrollbars
    --disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe'''.split()

def chromium():
    "The program, or None"
    return next((o for o in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if o), None)

class Browser:
    "One page of a browser, and everything that happened on it since `go`"
    def __init__(self):
        self.dir,self.count,self.events,self.buffer = tempfile.TemporaryDirectory(ignore_cleanup_errors=True),0,[],b''
        (read,self.out),(self.inp,write) = os.pipe(),os.pipe()
        theirs = [fcntl.fcntl(o, fcntl.F_DUPFD_CLOEXEC, 10) for o in (read, write)]
        for o in (read, write): os.close(o)
        pipes = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'            # the browser reads from 3 and writes to 4
        command = ['bash', '-c', pipes, 'bash', chromium(), *FLAGS, f'--user-data-dir={self.dir.name}', 'about:blank']
        self.process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for o in theirs: os.close(o)
        self.session = None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for o in ('Page', 'Network', 'Runtime', 'Log'): self.call(f'{o}.enable')
    def __enter__(self): return self
    def __exit__(self, *_):
        self.process.kill(); self.process.wait()
        os.close(self.out); os.close(self.inp)
        self.dir.cleanup()

    def message(self, seconds=30):
        "The next message of the browser"
        while b'\0' not in self.buffer:
            ready,_,_ = select.select([self.inp], [], [], seconds)
            more = os.read(self.inp, 1<<20) if ready else b''
            if not more: raise TimeoutError('the browser says nothing')
            self.buffer += more
        one,_,self.buffer = self.buffer.partition(b'\0')
        return json.loads(one)
    def call(self, method, **params):
        "Send a command and wait for its result; what happens meanwhile goes to `events`"
        self.count += 1
        words = dict(id=self.count, method=method, params=params) | ({'sessionId':self.session} if self.session else {})
        os.write(self.out, json.dumps(words).encode() + b'\0')
        while (m := self.message()).get('id')!=self.count: self.events.append(m)
        if 'error' in m: raise RuntimeError(f'{method}: {m["error"]["message"]}')
        return m['result']
    def go(self, url):
        "Load a page; returns when its `load` event has come"
        self.events = []
        self.call('Page.navigate', url=url)
        while not any(o.get('method')=='Page.loadEventFired' for o in self.events): self.events.append(self.message())
    def js(self, code):
        "Value of a JavaScript expression, a promise's too"
        r = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in r: raise RuntimeError(r['exceptionDetails'])
        return r['result'].get('value')
    def wait(self, code, seconds=15):
        "Wait until an expression is true"
        end = time.monotonic()+seconds
        while not (value := self.js(code)):
            if time.monotonic()>end: raise TimeoutError(f'never true: {code}')
            time.sleep(.05)
        return value
    def screen(self, width, dark=False, height=900):
        "Width of the window, that of a phone if it is small, and the colour scheme its reader likes"
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width<500)
        scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
        self.call('Emulation.setEmulatedMedia', features=[scheme])
    def picture(self, file, whole=False):
        "Write what is seen to a PNG file; `whole`: the whole page, not only the window"
        data = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=whole)['data']
        with open(file, 'wb') as f: f.write(base64.b64decode(data))

    def requests(self):
        "Addresses that the page has asked for"
        return [o['params']['request']['url'] for o in self.events if o.get('method')=='Network.requestWillBeSent']
    def errors(self):
        "What the page complained about: exceptions, console errors and warnings, files that did not come"
        found = []
        for o in self.events:
            p,kind = o.get('params', {}),o.get('method')
            if kind=='Runtime.exceptionThrown': found.append(p['exceptionDetails'].get('exception', {}).get('description'))
            if kind=='Log.entryAdded' and p['entry']['level']=='error': found.append(p['entry']['text'])
            if kind=='Runtime.consoleAPICalled' and p['type'] in ('error','assert'): found.append(str(p['args']))
            if kind=='Network.loadingFailed' and not p.get('canceled'): found.append(p['errorText'])
        return found
