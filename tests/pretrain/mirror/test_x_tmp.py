import json
def test_x(run, mirror, server):
    run.report(2,4); run.evaluation(4); mirror()
    print(json.dumps({k:v for k,v in server.summary.items() if 'top1' in k or 'perp' in k or k=='step'}))
    run.report(8); run.evaluation(8); mirror()
    print(json.dumps({k:v for k,v in server.summary.items() if 'top1' in k or 'perp' in k or k=='step'}))
    run.report(9);mirror()
    print(json.dumps({k:v for k,v in server.summary.items() if 'top1' in k or 'perp' in k or k=='step'}))
    assert 0
def test_big(run, mirror, offline):
    import resource
    for s in range(1,5001): run.lines._file.write(json.dumps({"step":s*20,"time":1.7e9+s,"samples":s*640,**{f"train/m{k}":k*1.0 for k in range(30)}}).encode()+b"\n")
    a=resource.getrusage(resource.RUSAGE_CHILDREN); mirror(); b=resource.getrusage(resource.RUSAGE_CHILDREN)
    print("cpu", b.ru_utime+b.ru_stime-a.ru_utime-a.ru_stime)
    assert 0
